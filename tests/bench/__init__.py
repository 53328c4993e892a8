"""labkit beside the real tools, in the same rounds: `python -m tests.bench [GROUP …]`. Not part of the test run.

Every goal is a ratio with its 95 % bootstrap interval over rounds in which both sides were measured alternately; an A/A run, the
same thing against itself, precedes every table and says what the machine's own unrest looks like as a ratio.
"""
