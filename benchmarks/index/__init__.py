"""``ratchet bench index``: an index outside follows a release and a rollback while its worker is killed."""
