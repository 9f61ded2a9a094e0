//! A simulated EKS node: the servers that a node talks to, in process and honest, and (where the tests are root)
//! its cgroups and network namespaces.

pub mod agent_process;
pub mod cgroupfs;
pub mod cluster;
mod crypto;
pub mod eks_agent_process;
pub mod eks_auth_server;
pub mod enter;
pub mod fault_injection;
mod http;
pub mod imds_server;
pub mod jwt;
pub mod kube_api;
pub mod memory;
pub mod pod;
pub mod process_id;
pub mod remote_control;
pub mod simulated_network;
pub mod simulated_node;
mod simulation;
pub mod state;
pub mod switches;

pub use self::{
    agent_process::{AgentProcess, AgentSpec},
    eks_agent_process::EksAgent,
    pod::{EnvKind, Pod, PodSpec},
    simulated_node::NODE_NAME,
    simulation::{CLUSTER_NAME, Lab, LabSpec, NODE_ACCESS_KEY_ID, NODE_ROLE, REGION},
};
