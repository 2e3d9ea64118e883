"""Who may do what: users, tokens, roles, and the audit log."""
