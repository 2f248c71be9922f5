"""Where things run and how they stay alive: configuration, campaign loop, fleets of actors, records, command line."""
