//! Commands to a lab that runs as a process of its own, over a private Unix socket.
//!
//! Owns what can be asked and how a question is sent: one JSON line each way. What is done is [`ControlServer`]'s.

mod control_client;
mod control_server;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use self::{control_client::ask, control_server::ControlServer};
use crate::{
    enter::Entry,
    pod::EnvKind,
    switches::{Setting, SwitchState},
};

/// A command to a running lab.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    /// How the lab is: answered with [`Status`].
    Status,
    /// Turns a switch on; answered with its [`Setting`].
    FaultOn {
        /// The switch.
        name: String,
        /// How to set it.
        setting: Setting,
    },
    /// Turns a switch off, or all.
    FaultOff {
        /// The switch; `None` for all.
        name: Option<String>,
    },
    /// Adds a pod; answered with the [`Pod`](crate::Pod).
    AddPod(NewPod),
    /// Ends a pod and deletes it.
    RemovePod {
        /// `NAME` or `NAMESPACE/NAME`.
        pod: String,
    },
    /// Gives a service account a role.
    Associate {
        /// Namespace of the service account.
        namespace: String,
        /// The service account.
        service_account: String,
        /// Name of the role.
        role: String,
    },
    /// Takes a service account's role away.
    Dissociate {
        /// Namespace of the service account.
        namespace: String,
        /// The service account.
        service_account: String,
    },
    /// Sets or removes annotations of a namespace.
    AnnotateNamespace {
        /// The namespace.
        namespace: String,
        /// The new value by key; `None` removes one.
        annotations: BTreeMap<String, Option<String>>,
    },
    /// Sets or removes annotations of a pod.
    AnnotatePod {
        /// `NAME` or `NAMESPACE/NAME`.
        pod: String,
        /// The new value by key; `None` removes one.
        annotations: BTreeMap<String, Option<String>>,
    },
    /// Starts the agent; answered with its process ID.
    StartAgent(NewAgent),
    /// Asks the agent to stop and waits for it; answered with its exit status as text.
    StopAgent,
    /// Kills the agent; answered with its exit status as text.
    KillAgent,
    /// Stops the agent if it runs and starts it again; answered with its process ID.
    RestartAgent(NewAgent),
    /// What the agent's metrics endpoint serves, as text.
    Metrics,
    /// How to run the agent's binary on the node; answered with [`AgentTool`].
    AgentTool,
}

/// A pod to add.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewPod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Service account; the pod's name where there is none.
    pub service_account: Option<String>,
    /// Role to associate with the service account; `None` leaves the association as it is.
    pub role: Option<String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Credential environment of its commands; with that of the webhook it has the token volume too.
    pub environment: EnvKind,
    /// Whether it is on the node's network.
    pub host_network: bool,
}

/// An agent to start. What is not given is as it was before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewAgent {
    /// The `podgate` binary.
    pub binary: Option<PathBuf>,
    /// Flags besides those that say where the lab's node is.
    pub flags: Option<Vec<String>>,
}

/// How a lab is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Every switch.
    pub switches: Vec<SwitchState>,
    /// Process ID of the agent, where one runs.
    pub agent: Option<u32>,
    /// The flags that the agent has, or had when it ran.
    pub agent_flags: Vec<String>,
}

/// How to run the agent's binary on the node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentTool {
    /// Where.
    pub entry: Entry,
    /// The binary.
    pub binary: PathBuf,
}

/// What a lab answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Ok(serde_json::Value),
    Error(String),
}

/// The directory of the socket: nobody but its owner may enter it.
fn directory(lab: &Path) -> PathBuf {
    lab.join("control")
}

fn socket(lab: &Path) -> PathBuf {
    directory(lab).join("lab.sock")
}
