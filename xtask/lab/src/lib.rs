//! A simulated EKS node: the servers that a node talks to, in process and honest, and (where the tests are root)
//! its cgroups and network namespaces.

pub mod agent;
pub mod cgroup;
pub mod cluster;
mod crypto;
pub mod eks_agent;
pub mod eks_auth;
pub mod enter;
pub mod faults;
mod http;
pub mod imds;
pub mod jwt;
pub mod kube_api;
pub mod lab;
pub mod memory;
pub mod netns;
pub mod node;
pub mod pod;
pub mod process;
pub mod state;

pub use self::{
    agent::{AgentProcess, AgentSpec},
    eks_agent::EksAgent,
    lab::{Lab, LabSpec},
    pod::{EnvKind, Pod, PodSpec},
};
