"""What people see of a running campaign, and how they steer it."""
