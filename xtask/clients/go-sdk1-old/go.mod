module podgate.dev/clients/go-sdk1

go 1.22

require github.com/aws/aws-sdk-go v1.25.0
