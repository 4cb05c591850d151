"""From networks to components for other runtimes."""
