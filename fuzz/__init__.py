"""The proof that the library survives faults: damaged files, kills, full disks, many processes, long runs.

`python -m fuzz --help` lists what can be run. No part of the installed package.
"""
