/* libFuzzer around an embedded Python: every input goes to a function of tests/fuzz/targets.py.

   The compiled kernels are built with coverage of their own. The lines of the Python code under
   test are counted here, edge by edge, in counters that libFuzzer looks at like its own: so it is
   guided through proto/wire/frames.py as it is through proto/codec/_decoder.pyx.

   Environment: FUZZ_TARGET names the function, FUZZ_TREE the directory of the instrumented
   packages; Python code outside of it is not counted. Without FUZZ_LINES none is: where kernels
   alone are tested, against their twins, it would cost four fifths of the time. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <frameobject.h>
#include <sanitizer/asan_interface.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

enum { COUNTERS = 1 << 14 };
__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t counters[COUNTERS];

static PyObject *target, *mutate;
static const char *tree, *lines;

/* ---- coverage of Python code */

struct seen {
    uint32_t hash;      /* of the code object: the same in each run */
    int counted;
    int line;           /* the last one that ran */
};

static Py_ssize_t extra;

static uint32_t hash_of(uint32_t hash, const char *text)
{
    while (*text)
        hash = (hash ^ (uint8_t)*text++) * 16777619u;
    return hash;
}

static struct seen *seen_of(PyObject *code)
{
    void *known = NULL;
    if (_PyCode_GetExtra(code, extra, &known) == 0 && known)
        return known;
    struct seen *seen = calloc(1, sizeof *seen);
    const char *file = PyUnicode_AsUTF8(((PyCodeObject *)code)->co_filename);
    const char *name = PyUnicode_AsUTF8(((PyCodeObject *)code)->co_qualname);
    if (!seen || !file || !name)
        abort();
    seen->counted = !strncmp(file, tree, strlen(tree));
    seen->hash = hash_of(hash_of(2166136261u, file + (seen->counted ? strlen(tree) : 0)), name);
    _PyCode_SetExtra(code, extra, seen);
    return seen;
}

static int trace(PyObject *unused, PyFrameObject *frame, int what, PyObject *arg)
{
    (void)unused, (void)arg;
    if (what != PyTrace_CALL && what != PyTrace_LINE)
        return 0;
    PyCodeObject *code = PyFrame_GetCode(frame);
    struct seen *seen = seen_of((PyObject *)code);
    Py_DECREF(code);
    if (!seen->counted)
        return what == PyTrace_CALL
                   ? PyObject_SetAttrString((PyObject *)frame, "f_trace_lines", Py_False) : 0;
    int line = what == PyTrace_CALL ? 0 : PyFrame_GetLineNumber(frame);
    uint32_t edge = seen->hash ^ (uint32_t)line * 2654435761u ^ (uint32_t)seen->line * 40503u;
    uint8_t *counter = &counters[(edge ^ edge >> 15) % COUNTERS];
    *counter += *counter < 255;
    seen->line = line;
    return 0;
}

/* ---- what the targets need of the sanitizers and of libFuzzer */

static PyObject *poison(PyObject *module, PyObject *args)
{
    Py_buffer view;
    Py_ssize_t front, back;
    int closed;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*nnp", &view, &front, &back, &closed))
        return NULL;
    char *at = view.buf;
    if (closed) {
        __asan_poison_memory_region(at, (size_t)front);
        __asan_poison_memory_region(at + view.len - back, (size_t)back);
    } else {
        __asan_unpoison_memory_region(at, (size_t)view.len);
    }
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *mutated(PyObject *module, PyObject *args)
{
    const char *data;
    Py_ssize_t size, most;
    (void)module;
    if (!PyArg_ParseTuple(args, "y#n", &data, &size, &most))
        return NULL;
    if (size > most)
        size = most;
    PyObject *room = PyBytes_FromStringAndSize(NULL, most);
    if (!room)
        return NULL;
    memcpy(PyBytes_AS_STRING(room), data, (size_t)size);
    size_t length = LLVMFuzzerMutate((uint8_t *)PyBytes_AS_STRING(room), (size_t)size, (size_t)most);
    _PyBytes_Resize(&room, (Py_ssize_t)length);
    return room;
}

static PyMethodDef methods[] = {
    {"poison", poison, METH_VARARGS, "poison(buffer, front, back, closed)"},
    {"mutated", mutated, METH_VARARGS, "mutated(data, most): as libFuzzer changes it"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "xbfuzz", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

static PyObject *init_module(void)
{
    return PyModule_Create(&module);
}

/* ---- libFuzzer's three calls */

static void die(void)
{
    PyErr_Print();
    fflush(NULL);
    abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    PyConfig config;
    const char *name = getenv("FUZZ_TARGET");
    (void)argc, (void)argv;
    tree = getenv("FUZZ_TREE");
    lines = getenv("FUZZ_LINES");
    if (!name || !tree) {
        fprintf(stderr, "FUZZ_TARGET and FUZZ_TREE are not set: use python -m tests.fuzz\n");
        exit(2);
    }
    PyImport_AppendInittab("xbfuzz", init_module);
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0;
    PyConfig_SetBytesString(&config, &config.executable, FUZZ_PYTHON);
    PyConfig_SetBytesString(&config, &config.program_name, FUZZ_PYTHON);
    PyStatus status = Py_InitializeFromConfig(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    PyObject *path = PySys_GetObject("path"), *first = PyUnicode_FromString(tree);
    PyList_Insert(path, 0, first);
    PyObject *targets = PyImport_ImportModule("tests.fuzz.targets");
    PyObject *mutator = PyImport_ImportModule("tests.fuzz.mutator");
    if (!targets || !mutator)
        die();
    target = PyObject_CallMethod(targets, "target", "s", name);
    mutate = PyObject_GetAttrString(mutator, "mutate");
    if (!target || !mutate)
        die();
    extra = _PyEval_RequestCodeExtraIndex(free);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (lines)
        PyEval_SetTrace(trace, NULL);
    PyObject *result = PyObject_CallFunction(target, "y#", data, (Py_ssize_t)size);
    PyEval_SetTrace(NULL, NULL);
    if (!result)
        die();
    Py_DECREF(result);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed)
{
    PyObject *result = PyObject_CallFunction(mutate, "y#nI", data, (Py_ssize_t)size,
                                             (Py_ssize_t)most, seed);
    if (!result)
        die();
    size = (size_t)PyBytes_GET_SIZE(result);
    if (size > most)
        size = most;
    memcpy(data, PyBytes_AS_STRING(result), size);
    Py_DECREF(result);
    return size;
}
