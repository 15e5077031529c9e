"""The Explainer: the networks and the layers of one comparison."""
