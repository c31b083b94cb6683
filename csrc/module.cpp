// The loadable module: an empty Python module, so that importing it maps the library and a failure
// is a Python error with a reason. The kernels register themselves with torch (see */binding.cpp);
// the schemas are defined in Python. MAFNET_MODULE is _C or _C_cuda.
#include <Python.h>

#define MAFNET_STRING_OF(name) #name
#define MAFNET_STRING(name) MAFNET_STRING_OF(name)
#define MAFNET_INIT_OF(name) PyInit_##name
#define MAFNET_INIT(name) MAFNET_INIT_OF(name)

static PyModuleDef module_definition = {PyModuleDef_HEAD_INIT,
                                        MAFNET_STRING(MAFNET_MODULE),
                                        nullptr,
                                        -1,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr};

PyMODINIT_FUNC MAFNET_INIT(MAFNET_MODULE)(void) { return PyModule_Create(&module_definition); }
