"""The updater as a process: waits, trains, gates and proposes. Nothing is imported here, so that it starts without
torch."""
