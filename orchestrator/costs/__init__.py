"""What a run will cost: measured by a short calibration, then estimated stage by stage."""
