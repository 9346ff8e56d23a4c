"""A small world of rendered people: head model, appearance, renderer and motion."""
