"""Calibration: texts become tokens, tokens run through one decoder block at a time, and quantizers get what they asked for."""
