"""The method, on arrays and a function for the network: noise, losses, likelihood, sampling."""
