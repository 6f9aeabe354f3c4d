"""SSH over paramiko: keys, host keys, the user's settings, and connections."""
