# Asks for credentials the way an SDK does with the environment that it finds. $1 is the metadata service.
ask() {
    curl --silent --show-error --globoff --fail-with-body --max-time 30 --write-out '\n' "$@"
}
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}
if [ -n "$AWS_CONTAINER_CREDENTIALS_FULL_URI" ]; then
    token=$(cat "$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") || fail 'the pod has no token volume: try --env none'
    ask -H "Authorization: $token" "$AWS_CONTAINER_CREDENTIALS_FULL_URI"
elif [ -n "$AWS_CONTAINER_CREDENTIALS_RELATIVE_URI" ]; then
    ask "http://169.254.170.2$AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"
else
    token=$(ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$1/latest/api/token") || fail "$token"
    roles=$1/latest/meta-data/iam/security-credentials
    role=$(ask -H "X-aws-ec2-metadata-token: $token" "$roles/") || fail "$role"
    ask -H "X-aws-ec2-metadata-token: $token" "$roles/$role"
fi
