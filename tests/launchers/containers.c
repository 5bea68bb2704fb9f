/* Takes the options of pyxis and tells the tasks what was asked for; starts no container. */
#include <slurm/spank.h>
#include <stdio.h>
#include <string.h>

SPANK_PLUGIN(containers, 1)

static const char *variables[] = {"ASKED_IMAGE", "ASKED_MOUNTS", "ASKED_WORKDIR", "ASKED_NO_HOME"};
static char values[4][4096];

static int note(int which, const char *argument, int remote)
{
    (void)remote;
    snprintf(values[which], sizeof values[which], "%s", argument ? argument : "yes");
    return ESPANK_SUCCESS;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "image", 1, 0, note},
    {"container-mounts", "SRC:DST,...", "mounts", 1, 1, note},
    {"container-workdir", "DIR", "directory", 1, 2, note},
    {"no-container-mount-home", NULL, "no home", 0, 3, note},
};

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
    (void)argc, (void)argv;
    for (int which = 0; which < 4; which++)
        if (spank_option_register(spank, &options[which]) != ESPANK_SUCCESS)
            return ESPANK_ERROR;
    return ESPANK_SUCCESS;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
    (void)argc, (void)argv;
    for (int which = 0; which < 4; which++)
        if (values[which][0])
            spank_setenv(spank, variables[which], values[which], 1);
    return ESPANK_SUCCESS;
}
