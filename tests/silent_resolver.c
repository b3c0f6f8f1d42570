/* To be preloaded: looking up silent.invalid never ends, which is said on standard error, and
   two.invalid is two machines, 127.0.0.2 and 127.0.0.1. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **result)
{
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    if (node != NULL && strstr(node, "silent.invalid") != NULL
        && !(hints != NULL && hints->ai_flags & AI_NUMERICHOST))
    {
        static const char asked[] = "asked\n";
        if (write(2, asked, sizeof asked - 1) < 0)
            return EAI_SYSTEM;
        for (;;)
            pause();
    }
    if (node != NULL && strcmp(node, "two.invalid") == 0) {
        struct addrinfo *more;
        int failed = real("127.0.0.2", service, hints, result);
        if (failed || (failed = real("127.0.0.1", service, hints, &more)))
            return failed;
        (*result)->ai_next = more;
        return 0;
    }
    return real(node, service, hints, result);
}
