"""The command line, and one YAML for each experiment."""
