"""The course around the labs: find, run, check, ask, report. Notebooks use the five names in `labkit` only."""
