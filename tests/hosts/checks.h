/* What the host programs of these tests count as a failure. */
#ifndef CHECKS_H
#define CHECKS_H

#include <stdio.h>

#include "rewardrt.h"

static rrt_error err;
static int failures;

static void want(rrt_status got, rrt_status expected, int line) {
    if (got == expected) return;
    fprintf(stderr, "line %d: %s, expected %s (%s)\n", line, rrt_status_name(got), rrt_status_name(expected), err.text);
    failures++;
}
#define WANT(expected, call) want((call), (expected), __LINE__)
#define OK(call) WANT(RRT_OK, call)

static void that(int good, int line) {
    if (good) return;
    fprintf(stderr, "line %d: not so\n", line);
    failures++;
}
#define THAT(condition) that((condition), __LINE__)

#endif
