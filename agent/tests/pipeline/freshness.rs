//! Which credentials are fresh enough: each dialect has the floor of its clients.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::sync::Arc;

use agent::{
    credentials::{Credentials, Role, cache::Transferred},
    identity::{Pod, PodUid, Pods, ServiceAccountRef},
    testing,
};
use jiff::{SignedDuration, Timestamp};

use super::{
    ECS, Fault, Faults, IMDS, ImdsMode, Node, POD_IDENTITY, Service, TestPod, imds_credentials, injected,
};

const BELOW_FLOOR: &str = "podgate_credentials_below_floor_total";

/// Gives the agent credentials of the pod's that were fetched long ago.
fn cached(node: &Node, pod: &TestPod, minutes_left: i64) -> String {
    let service_account = ServiceAccountRef { namespace: "app".into(), name: "web".into() };
    let pod = Pod {
        uid: PodUid::parse(&pod.uid).unwrap(),
        service_account: service_account.clone(),
        ..testing::pod("app", "web")
    };
    let now = Timestamp::now();
    let expiration = now + SignedDuration::from_mins(minutes_left);
    let credentials = Credentials {
        access_key_id: "ASIACACHED".into(),
        secret_access_key: "secret".into(),
        session_token: "session".into(),
        expiration,
        obtained_at: expiration - SignedDuration::from_hours(6),
        role: Role { account_id: "123456789012".into(), partition: "aws".into(), name: "web-role".into() },
    };
    let cached = credentials.access_key_id.clone();
    node.cache.stage(vec![Transferred {
        pod: pod.uid,
        service_account,
        credentials: Arc::new(credentials),
        refresh_at: now,
        asked: true,
    }]);
    let known = Pods::default();
    known.insert(&Arc::new(pod));
    node.cache.adopt(&known);
    cached
}

/// Which of the callers at each of these addresses get cached credentials without a fetch of fresher ones. A caller for
/// whom they are not fresh enough is counted, since EKS Auth hangs.
async fn content(minutes_left: i64) -> Vec<&'static str> {
    let faults = Faults::default();
    faults.set(Service::EksAuth, Fault::Hang);
    let node = Node::start_with(ImdsMode::Intercept, faults).await;
    let pod = injected(&node);
    let cached = cached(&node, &pod, minutes_left);
    let token = pod.token(&node);
    let mut content = Vec::new();
    for (caller, address) in [("pod", POD_IDENTITY), ("ecs", ECS), ("imds", IMDS), ("token", "")] {
        let before = node.metric(BELOW_FLOOR);
        match caller {
            "token" => node.connect_anonymously(),
            _ => node.connect_as(&pod, address),
        }
        let answer = match address {
            IMDS => imds_credentials(&node).await,
            ECS => node.get("/v1/credentials", &[("Authorization", &token), ("Host", ECS)]).await,
            _ => node.get("/v1/credentials", &[("Authorization", &token)]).await,
        };
        assert_eq!((answer.status, answer.json()["AccessKeyId"].as_str()), (200, Some(&*cached)), "{caller}");
        if node.metric(BELOW_FLOOR) == before {
            content.push(caller);
        }
    }
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn each_dialect_has_the_floor_of_its_clients() {
    assert_eq!(content(31).await, ["pod", "ecs", "imds", "token"]);
    assert_eq!(content(25).await, ["pod", "ecs", "token"]);
    assert_eq!(content(19).await, [""; 0]);
}
