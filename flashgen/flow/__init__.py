"""Rectified-flow algebra: sigma grids, conversions, ODE steps; no networks."""
