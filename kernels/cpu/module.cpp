// The Python module: importing it loads the library, whose kernels register themselves.
#include <Python.h>

PyMODINIT_FUNC PyInit__kernels_cpu() {
  static PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_kernels_cpu"};
  return PyModule_Create(&module);
}
