//! Single changes to netdevs, addresses, neighbors and routes.
//!
//! Owns how each is asked of the kernel; never knows what the network is to look like.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{address::AddressHeaderFlags, route::RouteScope},
};

/// `RT_TABLE_MAIN` of `include/uapi/linux/rtnetlink.h`.
pub(super) const MAIN: u32 = 254;

pub(super) async fn netdev_index(handle: &Handle, name: &str) -> anyhow::Result<u32> {
    let netdev = handle
        .link()
        .get()
        .match_name(name)
        .execute()
        .try_next()
        .await
        .with_context(|| format!("cannot look up the netdev {name}"))?
        .with_context(|| format!("there is no netdev {name}"))?;
    Ok(netdev.header.index)
}

pub(super) async fn bring_up(handle: &Handle, netdev: u32) -> anyhow::Result<()> {
    let up = LinkUnspec::new_with_index(netdev).up().build();
    handle.link().set(up).execute().await.with_context(|| format!("cannot bring netdev {netdev} up"))
}

/// Adds one address without a subnet, usable at once (no duplicate address detection).
pub(super) async fn add_address(handle: &Handle, netdev: u32, address: IpAddr) -> anyhow::Result<()> {
    let mut request = handle.address().add(netdev, address, host_prefix(address));
    request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    request.execute().await.with_context(|| format!("cannot add {address}"))
}

pub(super) async fn add_neighbor(
    handle: &Handle,
    netdev: u32,
    address: IpAddr,
    mac: [u8; 6],
) -> anyhow::Result<()> {
    handle
        .neighbours()
        .add(netdev, address)
        .link_layer_address(&mac)
        .execute()
        .await
        .with_context(|| format!("cannot add the neighbor {address}"))
}

/// Routes one address straight onto the netdev.
pub(super) async fn add_host_route(
    handle: &Handle,
    netdev: u32,
    address: IpAddr,
    table: u32,
) -> anyhow::Result<()> {
    let route = RouteMessageBuilder::<IpAddr>::new()
        .table_id(table)
        .output_interface(netdev)
        .destination_prefix(address, host_prefix(address))?
        .scope(RouteScope::Link)
        .build();
    handle.route().add(route).execute().await.with_context(|| format!("cannot add the route to {address}"))
}

/// Routes everything else, as far as `table` goes, by `gateway`, which is in no subnet of the netdev's: hence `onlink`.
pub(super) async fn add_default_route(
    handle: &Handle,
    netdev: u32,
    gateway: IpAddr,
    table: u32,
) -> anyhow::Result<()> {
    let everything: IpAddr =
        if gateway.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let route = RouteMessageBuilder::<IpAddr>::new()
        .table_id(table)
        .output_interface(netdev)
        .destination_prefix(everything, 0)?
        .gateway(gateway)?
        .onlink()
        .build();
    handle.route().add(route).execute().await.with_context(|| format!("cannot add the route by {gateway}"))
}

pub(super) fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}
