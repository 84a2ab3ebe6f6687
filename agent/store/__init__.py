"""What the supervisor keeps on disk, such that power may fail at any instruction."""
