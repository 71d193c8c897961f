"""Feedback alignment: errors sent back through fixed random matrices."""
