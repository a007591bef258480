"""The updater as a process: it waits, trains, gates and proposes. Nothing is imported here: it starts without torch."""
