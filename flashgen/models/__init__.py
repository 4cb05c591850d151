"""Networks of diffusers-layout artifacts: loading, saving, sampling, sizes."""
