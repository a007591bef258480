"""The PostgreSQL of the benchmarks."""

from benchmarks.fixtures.postgres import PostgresServer, free_port, postgres, postgres_server

__all__ = ["PostgresServer", "free_port", "postgres", "postgres_server"]
