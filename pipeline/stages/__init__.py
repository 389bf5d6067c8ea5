"""The stages of a release: the table of them, what each works with, and one module a stage."""
