"""Rounds over real sites: a core of pure functions and state machines, without sockets or clocks, and a rim around it.

frames       bytes -> tensors: the only door, checked against limits and an expected schema
control      the messages that sites and server exchange
packing      a task and a report as a message and a frame
admission    what is looked at in an update before it counts
coordinator  the server's side of a run: events in, effects out
buffering    the same of an asynchronous run
party        the site's side of a run: events in, effects out
storage      files and journals that survive a crash, on a file system that is handed in
state        journals in a database, SQLite or PostgreSQL
spool        accepted updates on disk, and their reduction in the cohort's order
service      carries out what the coordinator decides
buffered     carries out what buffering decides
agent        carries out what the party decides

The rim:

keys         Ed25519 identities, the server's certificate authority, TLS
signing      signatures of requests and answers (RFC 9421), and what makes a request fresh
enrolment    invites, and the roster of those who took one up
home         the folder of a party
calls        what is asked beside rounds, and who may ask it
policy       what a site's owner allows, and the journal of what left
children     processes that run an author's code
hub          what a server knows and does
server       the server's door: HTTPS, who is heard, and how much of it
client       a party's line to its server
site         the site's program
"""
