"""Timing: candidates in turns, alternatives, reports."""
