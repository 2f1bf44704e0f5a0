"""Measurements that the project reports; each is a program."""
