"""The database: tables, queries, migrations. Nothing of SQLModel leaves this package but the session."""
