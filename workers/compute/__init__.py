"""The forward pass: layers on numpy and C kernels that compute on stored weights and on KV pages in place."""
