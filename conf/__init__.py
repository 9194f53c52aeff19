"""The configuration groups, shipped as package data."""
