"""The "Input Hessian" tab of TensorBoard. Imports neither torch nor Lightning nor matplotlib."""
