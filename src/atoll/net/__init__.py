"""Rounds over real sites: the core of a deployment as pure functions and state machines, without sockets or clocks.

frames       bytes -> tensors: the only door, checked against limits and an expected schema
control      the messages that sites and server exchange
packing      a task and a report as a message and a frame
admission    what is looked at in an update before it counts
coordinator  the server's side of a run: events in, effects out
party        the site's side of a run: events in, effects out
storage      files and logs that survive a crash, on a file system that is handed in
spool        accepted updates on disk, and their reduction in the cohort's order
service      carries out what the coordinator decides
agent        carries out what the party decides
"""
