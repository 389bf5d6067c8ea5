"""How the image serves under load: traffic, evidence, and the load gate."""
