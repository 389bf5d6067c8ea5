"""The command line's commands, a module a subject; heavy imports wait inside them, so that ``--help`` stays instant."""
