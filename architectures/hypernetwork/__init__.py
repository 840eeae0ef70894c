"""Hypernetworks: a small network generates, for every task, the weights of the network that answers."""
