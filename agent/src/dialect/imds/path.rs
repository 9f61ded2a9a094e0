//! What can be read, by path: the exact list.
//!
//! Owns the list; never decides who may read.

/// The names below `iam`.
pub(super) const IAM: &str = "info\nsecurity-credentials/";

/// The versions that EC2 lists and that have roles. A path may name any date.
const VERSIONS: &str = "1.0\n2012-01-12\n2014-02-25\n2014-11-05\n2015-10-20\n2016-04-19\n2016-06-30\n2016-09-02\n\
                        2018-03-28\n2018-08-17\n2018-09-24\n2019-10-01\n2020-10-27\n2021-01-03\n2021-03-23\n\
                        2021-07-15\n2022-09-24\n2024-04-11\nlatest";

/// Directories below a version and the names in them. A directory in them ends with a slash, except at the top.
const LISTINGS: [(&str, &str); 6] = [
    ("", "dynamic\nmeta-data"),
    ("dynamic", "instance-identity/"),
    ("dynamic/instance-identity", "document"),
    ("meta-data", "iam/\ninstance-id\ninstance-type\nplacement/\nservices/"),
    ("meta-data/placement", "availability-zone\navailability-zone-id\nregion"),
    ("meta-data/services", "domain\npartition"),
];

/// What a read is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadPath<'a> {
    /// The list of roles.
    Roles,
    /// A role's credentials.
    Role(&'a str),
    /// The names below `iam`.
    Iam,
    /// The instance profile.
    Info,
    /// A fact of the instance.
    Fact(Fact),
    /// The names in a directory.
    Listing(&'static str),
    /// Anything else.
    Other,
}

/// A fact of the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fact {
    /// The region.
    Region,
    /// The availability zone.
    Zone,
    /// The availability zone's id, the same in every account.
    ZoneId,
    /// The instance's id.
    InstanceId,
    /// The instance's type.
    InstanceType,
    /// The domain of AWS's services.
    Domain,
    /// The partition of ARNs.
    Partition,
    /// The instance identity document, reduced.
    Document,
}

// === impl ReadPath ===

impl<'a> ReadPath<'a> {
    /// Parses a path. A trailing slash makes no difference except after a role: botocore adds one after the zone, and
    /// .NET and C++ omit it after the list of roles.
    pub(crate) fn parse(path: &'a str) -> Self {
        let Some(path) = path.strip_prefix('/') else { return Self::Other };
        if path.is_empty() {
            return Self::Listing(VERSIONS);
        }
        let (version, path) = path.split_once('/').unwrap_or((path, ""));
        if !is_version(version) {
            return Self::Other;
        }
        if let Some(role) = path.strip_prefix("meta-data/iam/security-credentials/")
            && !role.is_empty()
        {
            return Self::Role(role);
        }
        let path = path.strip_suffix('/').unwrap_or(path);
        match path {
            "meta-data/iam/security-credentials" => Self::Roles,
            "meta-data/iam" => Self::Iam,
            "meta-data/iam/info" => Self::Info,
            "meta-data/placement/region" => Self::Fact(Fact::Region),
            "meta-data/placement/availability-zone" => Self::Fact(Fact::Zone),
            "meta-data/placement/availability-zone-id" => Self::Fact(Fact::ZoneId),
            "meta-data/instance-id" => Self::Fact(Fact::InstanceId),
            "meta-data/instance-type" => Self::Fact(Fact::InstanceType),
            "meta-data/services/domain" => Self::Fact(Fact::Domain),
            "meta-data/services/partition" => Self::Fact(Fact::Partition),
            "dynamic/instance-identity/document" => Self::Fact(Fact::Document),
            _ => {
                let listing = LISTINGS.iter().find(|(directory, _)| *directory == path);
                listing.map_or(Self::Other, |(_, names)| Self::Listing(names))
            }
        }
    }
}

// === impl Fact ===

impl Fact {
    /// Whether it only says where the instance is: an SDK without a region fails even with credentials, and an attacker
    /// learns nothing from it.
    pub(crate) const fn is_location(self) -> bool {
        matches!(self, Self::Region | Self::Zone | Self::ZoneId)
    }
}

/// `latest`, `1.0` or a date.
fn is_version(version: &str) -> bool {
    let date = |version: &str| {
        version.len() == 10
            && version.bytes().enumerate().all(|(position, byte)| match position {
                4 | 7 => byte == b'-',
                _ => byte.is_ascii_digit(),
            })
    };
    matches!(version, "latest" | "1.0") || date(version)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_spelling_of_a_path_is_known_and_nothing_else() {
        let cases = [
            ("/latest/meta-data/iam/security-credentials", ReadPath::Roles),
            ("/latest/meta-data/iam/security-credentials/", ReadPath::Roles),
            ("/2024-04-11/meta-data/iam/security-credentials/", ReadPath::Roles),
            ("/1.0/meta-data/iam/security-credentials/web", ReadPath::Role("web")),
            ("/latest/meta-data/iam/security-credentials/a/b", ReadPath::Role("a/b")),
            ("/latest/meta-data/iam/security-credentials/web/", ReadPath::Role("web/")),
            ("/latest/meta-data/iam", ReadPath::Iam),
            ("/latest/meta-data/iam/", ReadPath::Iam),
            ("/latest/meta-data/iam/info", ReadPath::Info),
            ("/latest/meta-data/placement/region", ReadPath::Fact(Fact::Region)),
            ("/latest/meta-data/placement/availability-zone/", ReadPath::Fact(Fact::Zone)),
            ("/latest/dynamic/instance-identity/document", ReadPath::Fact(Fact::Document)),
            ("/", ReadPath::Listing(VERSIONS)),
            ("/latest", ReadPath::Listing("dynamic\nmeta-data")),
            ("/latest/", ReadPath::Listing("dynamic\nmeta-data")),
            ("/latest/meta-data/services", ReadPath::Listing("domain\npartition")),
        ];
        for (path, expected) in cases {
            assert_eq!(ReadPath::parse(path), expected, "{path}");
        }
        for path in [
            "",
            "latest",
            "//latest/meta-data/iam/security-credentials/",
            "/latest//meta-data/iam/security-credentials/",
            "/latest/meta-data/iam/security-credentialsx",
            "/latest/meta-data/iam/../iam/security-credentials/",
            "/latest/meta-data/iam/security%2dcredentials/",
            "/LATEST/meta-data/iam/security-credentials/",
            "/next/meta-data/iam/security-credentials/",
            "/2024-4-11/meta-data/iam/security-credentials/",
            "/latest/meta-data/iam/info//",
            "/latest/user-data",
            "/latest/meta-data/local-ipv4",
            "/latest/meta-data/network/interfaces/macs/",
            "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
            "/latest/dynamic/instance-identity/pkcs7",
            "/latest/dynamic/instance-identity/signature",
        ] {
            assert_eq!(ReadPath::parse(path), ReadPath::Other, "{path}");
        }
    }

    #[test]
    fn every_name_in_a_listing_can_be_read() {
        for (directory, names) in LISTINGS.into_iter().chain([("meta-data/iam", IAM)]) {
            for name in names.lines() {
                let path = format!("/latest/{directory}/{name}").replace("//", "/");
                assert_ne!(ReadPath::parse(&path), ReadPath::Other, "{path}");
            }
        }
        for version in VERSIONS.lines() {
            assert_eq!(ReadPath::parse(&format!("/{version}/meta-data/iam")), ReadPath::Iam, "{version}");
        }
    }

    proptest! {
        #[test]
        fn credentials_are_only_below_their_own_directory(path in "(/|latest|meta-data|iam|security-credentials|\\.\\.|[a-z%0-9.]){0,9}") {
            let is_credentials = matches!(ReadPath::parse(&path), ReadPath::Roles | ReadPath::Role(_));
            let own = path.contains("/meta-data/iam/security-credentials");
            prop_assert!(own || !is_credentials, "{path}");
        }
    }
}
