//! The copy of what the instance is, from the lab's IMDS.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::{net::TcpListener, time::Duration};

use agent::instance_metadata::{self, Instance};
use aws_config::imds::client::Client;
use lab::{
    fault_injection::{Fault, Faults, Service},
    imds_server::{Imds, ImdsConfig, NodeCredentials},
};
use tokio::{sync::watch, time::timeout};

const TIMEOUT: Duration = Duration::from_secs(10);

fn serve(faults: &Faults) -> Imds {
    let credentials = NodeCredentials {
        access_key_id: "ASIANODE".into(),
        secret_access_key: "secret".into(),
        session_token: "token".into(),
    };
    let config = ImdsConfig {
        region: "eu-west-1".into(),
        zone: "eu-west-1b".into(),
        zone_id: "euw1-az2".into(),
        instance_id: "i-0".into(),
        ..ImdsConfig::new(credentials)
    };
    let imds = Imds::serve(vec![TcpListener::bind("127.0.0.1:0").unwrap()], config, faults.clone()).unwrap();
    imds.v2_required(true);
    imds
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_facts_are_copied_once_available_and_no_role_is() {
    let faults = Faults::default();
    let imds = serve(&faults);
    faults.set(Service::Imds, Fault::Drop);
    let client = Client::builder().max_attempts(1).endpoint(format!("http://{}", imds.address()));
    let (copy, mut known) = watch::channel(Instance::in_region(Some("us-west-2".into())));
    tokio::spawn(instance_metadata::follow(client.unwrap().build(), copy));

    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(*known.borrow(), Instance::in_region(Some("us-west-2".into())), "the IMDS is unavailable");
    faults.clear(Service::Imds);
    timeout(TIMEOUT, known.changed()).await.unwrap().unwrap();
    let expected = Instance {
        region: Some("eu-west-1".into()),
        zone: Some("eu-west-1b".into()),
        zone_id: Some("euw1-az2".into()),
        id: Some("i-0".into()),
        instance_type: Some("m7i.large".into()),
        architecture: Some("x86_64".into()),
        domain: Some("amazonaws.com".into()),
        partition: Some("aws".into()),
    };
    assert_eq!(*known.borrow(), expected);
    assert_eq!(imds.credential_reads(), 0);
    assert!(imds.requests().iter().all(|request| !request.path.contains("iam")), "{:?}", imds.requests());
}
