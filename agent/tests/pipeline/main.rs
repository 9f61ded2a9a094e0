//! The whole agent except for the kernel, in process: real requests in front, the lab's servers behind.

mod connections;
mod freshness;
mod harness;
mod key_rotation;
mod removed_pods;
mod roles;
mod tokens;
mod upstream;

use agent::policy::ImdsMode;
use harness::{Answer, Node, TestPod};
use lab::{
    fault_injection::{Fault, Faults, Service},
    kube_api::KubeApi,
};

const IMDS: &str = "169.254.169.254";
const POD_IDENTITY: &str = "169.254.170.23";
const ECS: &str = "169.254.170.2";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const TOKEN: &str = "/latest/api/token";
const WRONG_AUDIENCE: &str = "its audience is not pods.eks.amazonaws.com";
const TTL: (&str, &str) = ("X-aws-ec2-metadata-token-ttl-seconds", "21600");

async fn session(node: &Node) -> String {
    let answer = node.request("PUT", TOKEN, &[TTL]).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

async fn imds_v2(node: &Node, path: &str) -> Answer {
    let session = session(node).await;
    node.get(path, &[("X-aws-ec2-metadata-token", &session)]).await
}

/// The three requests that every IMDSv2 client makes.
async fn imds_credentials(node: &Node) -> Answer {
    let session = session(node).await;
    let header = [("X-aws-ec2-metadata-token", session.as_str())];
    let roles = node.get(ROLES, &header).await;
    assert_eq!(roles.status, 200, "{roles:?}");
    node.get(&format!("{ROLES}{}", roles.body), &header).await
}

fn web(node: &Node) -> TestPod {
    node.eks_auth.associate("app", "web", "web-role");
    node.pod("web-0", "web", |_| {})
}

/// A pod as the EKS webhook leaves it.
fn injected(node: &Node) -> TestPod {
    node.eks_auth.associate("app", "web", "web-role");
    node.pod("web-0", "web", |spec| spec.token_volume = true)
}
