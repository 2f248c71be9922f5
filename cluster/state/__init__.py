"""What a campaign must not lose: ledger, checkpoints, resume and rollback."""
