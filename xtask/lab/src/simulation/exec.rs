//! Commands of a lab: in its pods, on its node, and of the agent's binary.
//!
//! Owns where each runs and what it finds there. Never waits for one.

use std::path::Path;

use tokio::process::Command;

use super::{CLUSTER_NAME, Lab, REGION, kubeconfig};
use crate::{
    agent_process::AgentSpec,
    enter::{self, Entry, RunDirectory, base_environment},
    pod::{EnvKind, Pod},
    simulated_node::NODE_NAME,
};

impl Lab {
    /// A command in a pod's container; killed when dropped.
    pub fn exec<A: AsRef<str>>(
        &self,
        pod: &Pod,
        environment: EnvKind,
        command: &[A],
    ) -> anyhow::Result<Command> {
        self.command(&pod.entry(environment), command)
    }

    /// A command in a pod's container, but in another pod's network, as a mesh's proxy connects; killed when dropped.
    pub fn exec_through<A: AsRef<str>>(
        &self,
        pod: &Pod,
        network_of: &Pod,
        command: &[A],
    ) -> anyhow::Result<Command> {
        let entry = Entry { netns: network_of.sandbox.netns(), ..pod.entry(EnvKind::None) };
        self.command(&entry, command)
    }

    /// A command in a pod's container that sees the lab's directory on the node, as through a hostPath volume; killed when
    /// dropped.
    pub fn exec_with_node<A: AsRef<str>>(&self, pod: &Pod, command: &[A]) -> anyhow::Result<Command> {
        let directory = self.node.place.directory.clone();
        let run = RunDirectory::Own([(directory.clone(), directory)].into());
        self.command(&Entry { run, ..pod.entry(EnvKind::None) }, command)
    }

    /// A command in a pod's network, but in no pod's cgroup: podgate's programs do not see it; killed when dropped.
    pub fn exec_outside<A: AsRef<str>>(&self, pod: &Pod, command: &[A]) -> anyhow::Result<Command> {
        let entry = Entry { cgroup: self.node.place.entry().cgroup, ..pod.entry(EnvKind::None) };
        self.command(&entry, command)
    }

    /// A command on the node, outside any pod; killed when dropped.
    pub fn on_node<A: AsRef<str>>(&self, command: &[A]) -> anyhow::Result<Command> {
        self.command(&self.node.place.entry(), command)
    }

    /// Runs the agent's binary to its end in the agent's pod: for its other subcommands, and for configurations
    /// that it must refuse. Nothing is added to `arguments`.
    pub fn agent_tool<A: AsRef<str>>(&self, binary: &Path, arguments: &[A]) -> anyhow::Result<Command> {
        let entry = self.agent_entry(&self.agent_pod.container);
        self.command(&entry, &argv(binary, arguments.iter().map(AsRef::as_ref)))
    }

    /// Where the agent's binary runs for its other subcommands, with the settings that say where the lab's node is.
    pub(crate) fn agent_tool_entry(&self) -> Entry {
        let place = &self.node.place;
        let mut entry = self.agent_entry(&self.agent_pod.container);
        entry.env.extend(
            [
                ("PODGATE_NODE_NAME", NODE_NAME.to_owned()),
                ("PODGATE_CLUSTER_NAME", CLUSTER_NAME.to_owned()),
                ("PODGATE_CGROUP_ROOT", place.cgroups.below_mount.clone()),
                ("PODGATE_KUBELET_ROOT", place.kubelet().display().to_string()),
                ("PODGATE_BPFFS", place.bpffs().display().to_string()),
                ("PODGATE_HANDOVER_DIR", place.handover().display().to_string()),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        entry
    }

    pub(super) fn agent_command(&self, spec: &AgentSpec, container: &Path) -> anyhow::Result<Command> {
        let place = &self.node.place;
        let kubelet = place.kubelet().display().to_string();
        let bpffs = place.bpffs().display().to_string();
        let handover = place.handover().display().to_string();
        let mut arguments = vec!["run", "--node-name", NODE_NAME, "--cluster-name", CLUSTER_NAME];
        arguments.extend(["--cgroup-root", &place.cgroups.below_mount, "--kubelet-root", &kubelet]);
        arguments.extend(["--bpffs", &bpffs, "--handover-dir", &handover]);
        arguments.extend(spec.args.iter().map(String::as_str));
        let mut entry = self.agent_entry(container);
        entry.env.extend(spec.env.clone());
        self.command(&entry, &argv(&spec.binary, arguments.into_iter()))
    }

    /// The agent's container: the node's network, the lab's directory where it is, a `/run/podgate` of its own.
    fn agent_entry(&self, container: &Path) -> Entry {
        let place = &self.node.place;
        let directory = place.directory.clone();
        let mut env = base_environment();
        env.extend([
            ("AWS_REGION".to_owned(), REGION.to_owned()),
            ("AWS_ENDPOINT_URL_EKS_AUTH".to_owned(), self.eks_auth.url()),
            ("KUBECONFIG".to_owned(), kubeconfig(&self.node).display().to_string()),
        ]);
        Entry {
            cgroup: container.to_owned(),
            netns: place.keeper.netns(),
            run: RunDirectory::Own(
                [(directory.clone(), directory), ("/run/podgate".into(), place.agent_run())].into(),
            ),
            env,
        }
    }

    fn command<A: AsRef<str>>(&self, entry: &Entry, command: &[A]) -> anyhow::Result<Command> {
        let mut helper = Command::new(&self.helper);
        helper.arg(enter::SUBCOMMAND).arg(serde_json::to_string(entry)?).arg("--");
        helper.args(command.iter().map(AsRef::as_ref)).kill_on_drop(true);
        Ok(helper)
    }
}

fn argv<'a>(program: &Path, arguments: impl Iterator<Item = &'a str>) -> Vec<String> {
    std::iter::once(program.display().to_string()).chain(arguments.map(str::to_owned)).collect()
}
