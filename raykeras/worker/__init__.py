"""One rank of a run: training session, callbacks, resume, coordination."""
