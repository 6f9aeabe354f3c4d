"""The engines behind ``RayTunnels``: our own forwarder, sshtunnel, OpenSSH's client, and a helper process."""
