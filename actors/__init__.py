"""The roles that run models without changing them, and the types that pass between roles."""
